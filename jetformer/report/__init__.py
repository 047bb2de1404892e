"""Shows one run, or several side by side, as a page.

The page has last and best metrics, all curves, samples over time, evaluations by step, the configuration and the
parameters. `read` reads a workdir, `charts` draws curves, `page` renders the page; `python -m jetformer.report` calls
them.
"""
