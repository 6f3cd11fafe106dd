"""The second implementation of records and summary: standard library only, written for reading.

Shares nothing with the fast path but `dsatrace.schema`, so that each can catch the other.
"""
