"""Tasks whose answers can be checked, and the rule that turns a response into a reward."""
