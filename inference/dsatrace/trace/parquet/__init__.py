"""A run's records in Parquet, without loss: the file, its columns, and the rows they stand for."""
