"""Runs: the folder that a trained model leaves, its scores and plots, the leaderboard."""
