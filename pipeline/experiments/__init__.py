"""Experiments: YAML files whose steps call the stages. May import everything but ``commands``.

    file --schema--> Experiment --runner--> extract, train_head, finetune, predict --> one table

Use ``read_experiment``, ``experiment_names``, ``run_experiment``. A published experiment is one file in ``published/``.
"""
