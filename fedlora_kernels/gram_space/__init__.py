"""The space in which rules work: two R x R Gram matrices per module, and coefficients X, Y.

stack (batches) -> gram (grams) -> a rule's coefficients -> report
"""
