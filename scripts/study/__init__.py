"""The published study's reproduction: what is measured in its runs, judged, tabled and written.

measures.py measures runs, intervals.py says how sure a number is, claims.py judges the claims;
tables.py, published.py, symmetry.py, saturation.py and figures.py prepare what report.md.j2, the
report's text, shows; report.py puts it together.
"""
