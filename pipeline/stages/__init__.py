"""The stages: one module for each command, with what it does to files. May import every room but the commands.

    options -> one frozen object --> plan --> work --> a document (JSON), a summary (text)

No stage imports another, so that each can be read alone. The commands and ``experiments`` call them.
"""
