"""The commands, one function each: read options, call a stage, print one document."""
