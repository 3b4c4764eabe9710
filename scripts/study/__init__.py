"""The reproduction of the published study: measures its runs, judges its claims, writes the report.

measures.py measures runs, claims.py judges the claims.
tables.py, published.py, symmetry.py, saturation.py and figures.py prepare tables and figures.
report.py fills them into report.md.j2, the text of the report.
"""
