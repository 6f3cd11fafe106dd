"""RULER (Hsieh et al. 2024): 13 synthetic long-context tasks, read from files or generated.

example.py    the tasks; one example, its score, and which tokens of its prompt hold the answer
reader.py     rows of files, folders and archives -> examples
generator.py  examples of a given length; plans.py builds the prompts
texts.py      every sentence and word of a prompt
workload.py   examples -> requests, and RULER's entry in the table of data sets
"""
