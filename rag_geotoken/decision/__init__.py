"""From a pool of places to one answer: strategies, confidence and their tuning."""

# The function of that name in strategies.py, written with underscores.
STRATEGIES = (
    "bayes-risk",
    "bayes-risk-25",
    "bayes-risk-200",
    "log-probability",
    "medoid",
    "density",
    "mean-shift",
    "highest",
    "snap",
)
