"""What can be predicted of an image: one class, any number of labels, or numbers. May import the ground and scores.

    store --task_of()--> Task: checks targets, turns logits into predictions, scores them, says what runs and tables hold

`pipeline.tasks.task` is the interface, `pipeline.tasks.table` lists the tasks. No other room asks which task it is.
"""
