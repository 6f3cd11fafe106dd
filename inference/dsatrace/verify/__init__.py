"""Whether a run's files say what its positions say, checked with a second, plain implementation, which a
third in numpy spares most of the records.

run.py             the check of a whole run folder: start here
files.py           a run's files, read with the standard library
facts.py           the manifest's facts that no record depends on: dates, ranks, dimensions
rules.py           the manifest's settings that the records depend on
selections.py      what its ids are, and whose a set is
steps.py           the walk over the step records: plainly, or in chunks that processes share
fast.py            the third implementation: a chunk's records in numpy, "right" or "look again"
chosen.py          one record's selection there, and what bounds the accounts of its tiers
fast_summary.py    what those records add up to
parquet_steps.py   the second reader of trace_steps.parquet
check_record.py    one record against its own positions
check_tiers.py     its `kv_fetch`, and the totals of the tiers, where latents lie in several tiers
order.py           the records against each other
row.py             what the records of a request's step have in common
prefixes.py        what their prefixes prove of each other
requests.py        the lines of requests.jsonl, and what they add up to
workload.py        what the summary says of the workload, and the range of its scores
plain_record.py    the second implementation: a record from its positions
plain_summary.py   the second implementation: summary.json from the records
overlap.py         the second implementation: shares of a selection held elsewhere, and of the answer
digests.py         whether the files are still those that were written
mismatch.py        a finding: one field, its place, and what it should be
"""
