"""Data sets as they are served: rows become requests, answers become scores.

    workload.py       what every one of them offers
    ruler.py  longbench_v2.py  sharegpt.py  burstgpt.py

Knows no engine and no trace: a runner feeds the requests and brings the answers.
"""
