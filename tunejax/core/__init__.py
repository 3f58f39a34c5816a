"""Floor 1: paths, operators, sites, and the types Method, Model and Objective."""
