"""Fine-tuning: network and head are joined, proven equal to the run, and trained. May import ``heads`` and below.

    run + images | store --endtoend--> trunk (frozen) + tail (trained) --parity gate--> training --> run

Use ``network_of``, ``split_for_training``, ``Gate``, ``TuningSettings``.
"""
