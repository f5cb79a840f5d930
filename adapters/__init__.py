"""One module per host framework, imported only when asked for; `learner` needs none."""
