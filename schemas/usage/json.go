package usage

// MarshalJSON writes the event in its snake_case form, absent fields left out.
func (e Event) MarshalJSON() ([]byte, error) {
	return e.AppendJSON(make([]byte, 0, 384)), nil
}

// UnmarshalJSON reads one event and normalizes it; it does not validate it.
// Unknown fields are ignored, names match exactly.
func (e *Event) UnmarshalJSON(data []byte) error {
	d := decoders.Get().(*Decoder)
	defer decoders.Put(d)
	s := scanner{data: data}
	err, syntax := d.element(&s)
	if err = join(syntax, err); err != nil {
		return err
	}
	*e = d.ev
	e.Normalize()
	return nil
}
