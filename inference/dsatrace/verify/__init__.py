"""Whether a run's files say what its positions say; built on the plain implementation alone."""
