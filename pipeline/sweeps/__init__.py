"""Many heads on one store: listed, trained side by side, compared. May import ``heads`` and what lies below.

    sweep file --expand--> trials --> workers | bank --> runs --> leaderboard

Use ``run_sweep``, ``read_sweep``, ``near_duplicates``.
"""
