"""Configurations: the options of methods and runs, from files, flags and Python, checked."""
