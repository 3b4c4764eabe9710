"""TensorBoard's event file: writing blocks of scalars fast, the names of curves, and the charts.

layout.py holds the format, encode.py writes blocks of scalars, tags.py names what is written, and
charts.py lays out the custom charts. Nothing here reads an event file: TensorBoard does.
"""
