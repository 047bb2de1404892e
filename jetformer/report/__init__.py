"""Shows one run, or several side by side, as a single HTML file that loads nothing else.

    python -m jetformer.report --workdir=/tmp/digits
    python -m jetformer.report --compare=/tmp/digits,/tmp/digits_long --out=/tmp/digits.html

The page shows last and best metrics, all curves, samples over time, evaluations by step, the configuration and the
parameters. The run may still be training. Workdirs may be URLs.

`read` reads a workdir, `charts` draws curves, `page` renders the page.
"""
