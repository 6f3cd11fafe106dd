"""Data sets as they are served: rows become requests, answers become scores.

    workload.py       what every one of them offers a runner
    ruler.py  longbench_v2.py  sharegpt.py  burstgpt.py

Each file ends with its data set's entry for `catalog.DATA_SETS`.
Knows no engine and no trace: a runner feeds the requests and brings the answers.
"""
