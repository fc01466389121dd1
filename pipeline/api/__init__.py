"""The functions of the commands for Python: the same words, no logic of their own. May import all but the commands.

    arguments --> a stage --> Result: attributes, to_dict, to_pandas, repr, HTML

``pipeline`` names them at its door. Nothing here prints or configures logging; progress is shown on a terminal and in a
notebook only.
"""
