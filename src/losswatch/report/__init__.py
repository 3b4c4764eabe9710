"""Reads the files of a sweep, and makes data frames, tables and figures of them.

The report does not train and does not need torch. A sweep consists of folders `<sweep>/<run>/` with
TensorBoard event files and `result.json`, on any machine; a folder of sweeps is read like one
sweep. The contents of files are data: they are never executed, and markup and control characters
are made harmless before they are shown. If the files of a run are damaged, a warning names the run,
and the other runs are still read.

records.py reads the files of one run, runs.py all runs of a sweep. compare.py tests how the losses
differ, tables.py makes tables of runs and differences, words.py says in sentences what they show.
figures.py draws the curves, dependence.py
the results over a setting, both in the style of style.py.
"""
