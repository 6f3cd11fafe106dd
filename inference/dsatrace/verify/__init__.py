"""Whether a run's files say what its positions say; built on the plain implementation alone.

run.py             the whole check of a run folder: start here
files.py           the run's files, read with the standard library
rules.py           what the manifest says that the records must follow
check_record.py    one record against its own positions
check_tiers.py     its `kv_fetch`, and the totals of the tiers, where latents lie in several tiers
order.py           the records against each other
plain_record.py    the second implementation: a record from its positions
plain_tiers.py     ... its `kv_fetch`, token by token
plain_summary.py   ... summary.json from the records
overlap.py         ... its shares of a selection held elsewhere, and of the answer
requests.py        ... its totals of requests.jsonl
mismatch.py        what was found: one field, its place, and what it should be
"""
