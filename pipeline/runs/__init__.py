"""Run folders, the result of every training. May import ``scores`` and the ground; knows no kind of head.

    outcome --writing--> folder --Run.open--> config, metrics, predictions --board--> leaderboard

Other rooms use ``Run``, ``take_run``, ``write_run`` and ``leaderboard``.
"""
