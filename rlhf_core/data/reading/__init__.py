"""From files to records of one form: formats, columns, fields, dialogues."""
