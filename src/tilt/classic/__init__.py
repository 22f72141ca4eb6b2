"""Classic reinforcement learning on the same mathematics: finite processes with known answers, solved, learned and improved step by step."""
