"""The verbs of the command line, one file each: arguments, a `main()`, and nothing another layer needs."""
