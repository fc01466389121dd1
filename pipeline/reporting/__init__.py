"""The report and image grids: charts, tables, thumbnails. May import ``sweeps``, ``tuning``, ``heads`` and below.

    run --data--> tables and mistakes --charts, thumbnails--> one page

Use ``describe_run``, ``prediction_grid``, ``draw_grid``.
"""
