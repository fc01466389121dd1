"""Heads of scikit-learn as our own arrays, which are checked when they are read and evaluated by NumPy.

fitted classifier --converting--> `model.Model` --document--> ``head.json``, ``head.npz``
``head.skops`` of an earlier release --skops_file--> parts --converting--> `model.Model`
"""
