"""Looks into traced functions: tests of what a function never computes."""


def all_equations(jaxpr):
    """Every equation of a closed jaxpr, those of its loops and branches included."""
    pending = [jaxpr.jaxpr]
    while pending:
        inner = pending.pop()
        for equation in inner.eqns:
            yield equation
            for value in equation.params.values():
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    one = getattr(one, "jaxpr", one)
                    if hasattr(one, "eqns"):
                        pending.append(one)
