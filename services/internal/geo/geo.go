// Package geo tells the country and the network operator of an address.
package geo

// Location is what is known of an address; zero fields are unknown.
type Location struct {
	// Country is ISO 3166-1 alpha-2.
	Country string
	// ASN is the number of the autonomous system that announces the address.
	ASN    uint32
	ASName string
	// Hosting tells networks of servers from those of people.
	Hosting bool
}
