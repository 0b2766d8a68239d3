package anomaly

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"unique"
)

// codecVersion changes whenever state does. Version 1 ended before volumeLimits, version
// 2 before volumeSurge; any other form is refused, and the caller rebuilds from events.
const codecVersion = 3

// stateSizes are the sizes of the state by version.
var (
	stateSize  = binary.Size(state{})
	stateSizes = [codecVersion + 1]int{
		1: stateSize - binary.Size(volumeLimits{}) - binary.Size(volumeSurge{}),
		2: stateSize - binary.Size(volumeSurge{}),
		3: stateSize,
	}
)

// knownVersion reports whether a version of an encoding can be read.
func knownVersion(v byte) bool { return v >= 1 && v <= codecVersion }

// Encode is the key's whole baseline, episode included, nil if the key is unknown.
func (e *Engine) Encode(keyID string) []byte {
	p := e.keys.get(keyID)
	if p == nil {
		return nil
	}
	b := make([]byte, 0, stateSize+512)
	b = append(b, codecVersion)
	b, err := binary.Append(b, binary.LittleEndian, &p.state)
	if err != nil {
		panic(err) // the struct has a field without a fixed size: no input can cause it
	}
	b = appendString(b, p.org.Value())
	b = appendString(b, p.parent)
	for i := range p.Routes {
		if p.Routes[i].Hash != 0 {
			b = appendString(b, p.names[i].Value())
		}
	}
	var ep []byte
	if p.episode != nil {
		if ep, err = json.Marshal(p.episode); err != nil {
			panic(err)
		}
	}
	return appendString(b, string(ep))
}

// Decode replaces what is known of a key with the result of an [Engine.Encode].
// On an error the key stays as it was.
func (e *Engine) Decode(keyID string, data []byte) error {
	p := &profile{}
	data, err := p.decodeState(data)
	if err != nil {
		return fmt.Errorf("decode baseline: %w", err)
	}
	if err := p.state.check(); err != nil {
		return fmt.Errorf("decode baseline: %w", err)
	}
	d := decoder{data: data}
	p.org = unique.Make(d.string())
	p.parent = d.string()
	for i := range p.Routes {
		if p.Routes[i].Hash != 0 {
			p.names[i] = unique.Make(d.string())
		}
	}
	if ep := d.string(); ep != "" {
		p.episode = &episode{}
		if err := json.Unmarshal([]byte(ep), p.episode); err != nil {
			return fmt.Errorf("decode baseline: episode: %w", err)
		}
	}
	if d.bad || len(d.data) != 0 {
		return errors.New("decode baseline: cut short or followed by more")
	}
	p.strict = strictness(e.opts, p.org.Value(), keyID)
	p.planMix()
	e.keys.put(keyID, p)
	return nil
}

// decodeState reads the state at the beginning of an encoded baseline, of this
// version or of an earlier one, and returns what follows it.
func (p *profile) decodeState(data []byte) (rest []byte, err error) {
	if len(data) == 0 || !knownVersion(data[0]) || len(data) < 1+stateSizes[data[0]] {
		return nil, errors.New("not a baseline of this version")
	}
	size := stateSizes[data[0]]
	full := make([]byte, stateSize)
	copy(full, data[1:1+size])
	if err := binary.Read(bytes.NewReader(full), binary.LittleEndian, &p.state); err != nil {
		return nil, err
	}
	if data[0] == 1 {
		p.Record = math.MaxFloat32 // until the next hour is planned
	}
	if data[0] < 3 {
		p.UsualTop = p.HourTail.Top[3] // somewhat high, until it is learned
	}
	return data[1+size:], nil
}

// check refuses numbers that arithmetic could not go on from.
func (s *state) check() error {
	sums := float64(s.Level) + float64(s.Hours) + float64(s.Active) + float64(s.Actual) + float64(s.Expected) +
		float64(s.Batch) + float64(s.Spread) + float64(s.Excess) + float64(s.Lambda) + float64(s.MixHours) + float64(s.Pending) +
		float64(s.Surge) + float64(s.SurgeLag) + float64(s.SurgeSquare) + float64(s.UsualTop)
	for _, v := range s.Day {
		sums += float64(v)
	}
	for i := range s.Routes {
		sums += float64(s.Routes[i].Share) + float64(s.Routes[i].Evidence)
	}
	if math.IsNaN(sums) || math.IsInf(sums, 0) {
		return errors.New("not a number")
	}
	if s.Turned >= routeSlots || s.Stirred>>routeSlots != 0 || s.RecentAt >= recentEvents || s.PastAt >= pastEpisodes {
		return errors.New("index out of range")
	}
	return nil
}

type decoder struct {
	data []byte
	bad  bool
}

func (d *decoder) string() string {
	n, used := binary.Uvarint(d.data)
	if used <= 0 || n > uint64(len(d.data)-used) {
		d.bad, d.data = true, nil
		return ""
	}
	s := string(d.data[used : used+int(n)])
	d.data = d.data[used+int(n):]
	return s
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// EncodeSources is what is known of refused sources, which belongs to no key.
func (e *Engine) EncodeSources() []byte {
	b := []byte{codecVersion}
	for i := range e.sources.table {
		if s := &e.sources.table[i]; s.Key != 0 {
			b, _ = binary.Append(b, binary.LittleEndian, s)
		}
	}
	return b
}

// DecodeSources takes back the result of [Engine.EncodeSources].
func (e *Engine) DecodeSources(data []byte) error {
	size := binary.Size(source{})
	if len(data) < 1 || !knownVersion(data[0]) || (len(data)-1)%size != 0 {
		return errors.New("decode sources: not of this version")
	}
	t := make([]source, sourceSlots)
	for data = data[1:]; len(data) > 0; data = data[size:] {
		var s source
		if err := binary.Read(bytes.NewReader(data[:size]), binary.LittleEndian, &s); err != nil {
			return fmt.Errorf("decode sources: %w", err)
		}
		t[mix(s.Key)%sourceSlots] = s
	}
	e.sources.table = t
	return nil
}

// Inherit gives a key its parent's baseline, as a rotation does. A child that has
// lived on its own for longer than a few events keeps what it has.
func (e *Engine) Inherit(child, parent string) {
	from := e.keys.get(parent)
	own := e.keys.get(child)
	if from == nil || child == parent || own != nil && own.Events > 20 {
		return
	}
	p := &profile{state: from.state, org: from.org, parent: parent, names: from.names, strict: strictness(e.opts, from.org.Value(), child)}
	p.planMix()
	p.Past, p.PastAt, p.Revoked, p.RevokedAt = [pastEpisodes]pastEpisode{}, 0, 0, 0
	p.Recent = [recentEvents]uint32{}
	e.keys.put(child, p)
}

// Forget drops what is known of a key.
func (e *Engine) Forget(keyID string) { e.keys.remove(keyID) }
