"""A method of your own is one decorated function and one row of the table.

Put the file on PYTHONPATH and train with ++hpt.modules=[example_method] ++hpt.method=squared.
"""

from verl_hpt import METHODS, Estimator, Method, Term, part, parts, register_method


@part("likelihood")
def squared(tokens):
    """f(p) = p²/2, so f/p = p/2 and f' = p; over π_ref = 1 a token's weight is p·f' = p²."""
    p = tokens.log_prob.exp()
    return p / 2, p


imitation = Estimator(reference=parts.one, advantage=parts.unit, likelihood=squared)
register_method(Method("squared", METHODS["hpt"].rollouts, (Term("S", imitation),), when="gate", formula="hpt / S: p²"))
