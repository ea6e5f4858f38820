"""The command line: ``main`` has the list of commands, each group of which is a module here."""
