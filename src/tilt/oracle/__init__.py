"""The truth by enumeration: a token MDP in which every batch can be listed, exact expectations of a row's gradient, and the audit of a row."""
