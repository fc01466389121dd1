"""Fine-tuning: network and head as one, cut where training begins, proven equal first. May import ``heads`` and below.

    run + images | cache --endtoend--> split network --parity gate--> training --> run

Use ``network_of``, ``split_for_training``, ``Gate``, ``TuningSettings``.
"""
