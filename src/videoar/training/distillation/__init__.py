"""A teacher of many steps becomes a student of few."""
