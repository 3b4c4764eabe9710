"""What a sweep left on disk, as data frames, tables and figures.

Nothing here trains or needs torch. A sweep is its folders `<sweep>/<run>/` with TensorBoard event
files and `result.json`, on whatever machine they are; a folder of sweeps is read like one sweep.
The files' contents are data: they are never executed, and markup and control characters are made
harmless wherever they are shown. A run whose files are damaged is named in a warning and does not
stop the others.

records.py reads what one run says of itself, runs.py all runs of a sweep. compare.py tests how the
losses differ, tables.py shows runs and differences. figures.py draws the curves, dependence.py the
results over a setting, both in the style of style.py.
"""
