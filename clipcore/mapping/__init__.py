"""The mapping between two models: the spec of layer kinds as data, finding a plan, and the plan itself."""
