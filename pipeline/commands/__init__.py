"""The command line: options become one frozen object, a stage runs, one document is printed. Imports everything.

Each module adds its commands to ``app``; ``common`` has the options and helpers that several share. Stages are imported
when a command runs, so that ``--help`` loads nothing heavy.
"""
