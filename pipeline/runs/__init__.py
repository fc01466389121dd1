"""Run folders: what every training leaves behind. May import ``scores`` and the ground; knows no kind of head.

    outcome --writing--> folder --Run.open--> config, metrics, predictions --board--> leaderboard

Use ``Run``, ``choose_run``, ``write_run``, ``leaderboard``.
"""
