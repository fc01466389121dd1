"""The application: three stages and what is around them. ``python -m pipeline --help``.

cli, commands/             options -> a stage -> one document
extract                    stage one
train_head, heads/         stage two: one head; its kinds, and the bank that trains many at once
sweeps/                    many heads in parallel, and the choice among them
finetune, tuning/          stage three
runs/                      what every training leaves: folder, scores, plots, leaderboard
predict, predicting/       new images; export, exporting/: one artefact; report, reporting/, preview: to look at
experiments, recipes/      published recipes
cluster/                   the same on many machines
config, outputs, progress, tables    used by all
"""
