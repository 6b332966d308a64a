"""The run folder: what a stage has to do, its ledger and its files; the command line and what it prints."""
