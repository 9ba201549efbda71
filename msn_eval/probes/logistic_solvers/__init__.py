"""Solvers for L2-regularised multinomial logistic regression."""
