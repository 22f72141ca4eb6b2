"""Other people's code in processes of its own: watched by a keeper, limited, and gone with all that it started. Standard library only."""
