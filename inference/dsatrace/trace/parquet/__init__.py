"""A run's records in Parquet, without loss: the file, and its columns."""
