"""Sweeps: many heads are trained on the same stores and compared. May import ``heads`` and the rooms below it.

    sweep file --expand--> trials --> workers | bank --> runs --> leaderboard

Other rooms use ``run_sweep``, ``read_sweep`` and ``near_duplicates``.
"""
