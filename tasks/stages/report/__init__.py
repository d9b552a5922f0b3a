"""Stage `report`: one page of the whole run."""
