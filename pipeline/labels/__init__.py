"""What people and machines decided about images, kept in a file of its own and put over a store.

    decisions --append_decisions--> labels.csv --read_labels--> Labels --with_labels--> a store under the effective labels

README.md says what the file holds.
"""
